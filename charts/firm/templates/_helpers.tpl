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
{{ include "firm.repository" . }}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ .image.tag | default .root.Chart.AppVersion }}{{ end -}}
{{- end }}

{{/* The same without tag or digest. */}}
{{- define "firm.repository" -}}
{{- with .root.Values.imageRegistry | default .image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{ .image.repository }}
{{- end }}

{{- define "firm.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- end }}

{{/* Where pods run: (dict "root" $ "component" NAME) */}}
{{- define "firm.scheduling" -}}
{{- $own := get .root.Values.components .component | default dict }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" }}
{{- with get $own $key | default (get $.root.Values $key) }}
{{ $key }}: {{ toJson . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Labels and annotations of pods: (dict "root" $ "component" NAME), and "annotations" of their own. */}}
{{- define "firm.podMetadata" -}}
{{- $own := get .root.Values.components .component | default dict -}}
labels:
  {{- include "firm.selector" . | nindent 2 }}
  {{- with merge (dict) ($own.labels | default dict) .root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with merge (dict) (.annotations | default dict) ($own.annotations | default dict) .root.Values.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The authority of caBundle, as a volume of a pod and where a container finds it: ConfigMap `firm` says so. */}}
{{- define "firm.caVolume" -}}
{{- with .Values.caBundle }}
{{- if .existingSecret }}
- name: ca
  secret: {secretName: {{ .existingSecret }}, items: [{key: {{ .key }}, path: {{ .key }}}]}
{{- end }}
{{- end }}
{{- end }}

{{- define "firm.caMount" -}}
{{- if .Values.caBundle.existingSecret }}
- {name: ca, mountPath: /etc/firm/ca, readOnly: true}
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

{{/* Whether the store is the MinIO of chart platform. */}}
{{- define "firm.minio" -}}
{{- if eq .Values.objectStore.endpoint "minio:9000" }}true{{ end }}
{{- end }}

{{/* Keys of KFP's and Argo's own files, which are not those of FIRM's code where the store has users of its own. */}}
{{- define "firm.pipelinesSecret" -}}
{{- $store := .Values.objectStore }}
{{- $ours := and (include "firm.minio" .) (not $store.accessKey) }}
{{- $store.pipelinesSecret | default $store.existingSecret | default (ternary "object-store-kfp" "object-store" (not (not $ours))) }}
{{- end }}

{{- define "firm.pipelineRoot" -}}
{{ .Values.kfp.pipelineRoot | default (printf "minio://%s/kfp" .Values.objectStore.bucket) }}
{{- end }}

{{- define "firm.endpointsSecret" -}}
{{ .Values.endpoints.existingSecret | default "firm-endpoints" }}
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
    valueFrom: {secretKeyRef: {name: {{ include "firm.endpointsSecret" . }}, key: api-key, optional: true}}
  - name: HF_TOKEN
    valueFrom: {secretKeyRef: {name: {{ include "firm.endpointsSecret" . }}, key: hf-token, optional: true}}
{{- end }}
