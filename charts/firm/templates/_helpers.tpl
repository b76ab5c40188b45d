{{/* Labels of an object: (dict "root" $ "component" "critic") */}}
{{- define "firm.labels" -}}
{{ include "firm.selector" . }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Labels that pods are selected by; they stay the same over upgrades. */}}
{{- define "firm.selector" -}}
app.kubernetes.io/name: firm-{{ .component }}
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/part-of: firm
{{- end }}

{{/* Reference of an image: (dict "root" $ "image" .Values.image.slim) */}}
{{- define "firm.image" -}}
{{- with .image.registry | default .root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{ .image.repository }}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default .root.Chart.AppVersion }}{{ end -}}
{{- end }}

{{- define "firm.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Pod Security "restricted", for a pod and for a container. */}}
{{- define "firm.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "firm.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "firm.objectStoreSecret" -}}
{{ .Values.objectStore.existingSecret | default "object-store" }}
{{- end }}

{{- define "firm.objectStoreUrl" -}}
{{ ternary "https" "http" .Values.objectStore.secure }}://{{ .Values.objectStore.endpoint }}
{{- end }}

{{- define "firm.objectStorePort" -}}
{{- $url := urlParse (include "firm.objectStoreUrl" .) -}}
{{ splitList ":" $url.host | rest | last | default (ternary 443 80 .Values.objectStore.secure) }}
{{- end }}

{{/* Claim of the model cache; empty where there is none. */}}
{{- define "firm.modelCache" -}}
{{- if .Values.modelCache.enabled }}{{ .Values.modelCache.existingClaim | default "firm-model-cache" }}{{ end -}}
{{- end }}

{{- define "firm.priorityClass" -}}
{{- with .Values.priorityClass }}{{ .name | default (ternary (printf "%s-training" $.Release.Namespace) "" .create) }}{{ end -}}
{{- end }}

{{/* Environment by which FIRM reaches the object store and endpoints. */}}
{{- define "firm.environment" -}}
envFrom:
  - configMapRef: {name: firm}
env:
  - name: HOME
    value: /tmp
  - name: AWS_ACCESS_KEY_ID
    valueFrom: {secretKeyRef: {name: {{ include "firm.objectStoreSecret" . }}, key: accesskey}}
  - name: AWS_SECRET_ACCESS_KEY
    valueFrom: {secretKeyRef: {name: {{ include "firm.objectStoreSecret" . }}, key: secretkey}}
  - name: OPENAI_API_KEY
    valueFrom: {secretKeyRef: {name: firm-endpoints, key: api-key, optional: true}}
  - name: HF_TOKEN
    valueFrom: {secretKeyRef: {name: firm-endpoints, key: hf-token, optional: true}}
{{- end }}
