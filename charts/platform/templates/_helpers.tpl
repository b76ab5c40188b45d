{{/* Labels of an object. Call with (dict "root" $ "component" NAME). */}}
{{- define "platform.labels" -}}
{{ include "platform.podLabels" . }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{- define "platform.selector" -}}
app.kubernetes.io/name: {{ .component }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end }}

{{/* Labels of pods: without versions, so that an upgrade restarts only what it changes. */}}
{{- define "platform.podLabels" -}}
{{ include "platform.selector" . }}
app.kubernetes.io/part-of: firm-platform
{{- end }}

{{/* Metadata of an object. "keep" true: `helm uninstall` leaves it, if persistence.keep says so. */}}
{{- define "platform.metadata" -}}
name: {{ .name | default .component }}
labels:
  {{- include "platform.labels" . | nindent 2 }}
{{- if and .keep .root.Values.persistence.keep }}
annotations: {helm.sh/resource-policy: keep}
{{- end }}
{{- end }}

{{/* Image reference; a digest wins over the tag. Call with (dict "root" $ "image" IMAGE "version" TAG). */}}
{{- define "platform.image" -}}
{{- $tag := .image.tag | default .version -}}
{{ .root.Values.imageRegistry | default .image.registry }}/{{ .image.repository }}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ $tag }}{{ end }}
{{- end }}

{{/* What every pod of this chart has in its spec, restricted Pod Security first. Call with (dict "root" $), and "user" UID,
"account" SERVICEACCOUNT, "grace" SECONDS for programs that ignore SIGTERM. */}}
{{- define "platform.pod" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .user | default 65532 }}
  runAsGroup: {{ .user | default 65532 }}
  fsGroup: {{ .user | default 65532 }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
enableServiceLinks: false
{{- with .grace }}
terminationGracePeriodSeconds: {{ . }}
{{- end }}
{{- with .account }}
serviceAccountName: {{ . }}
{{- else }}
automountServiceAccountToken: false
{{- end }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with .root.Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .root.Values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .root.Values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- end }}

{{- define "platform.containerSecurity" -}}
securityContext:
  {{- with .uid }}
  runAsUser: {{ . }}
  {{- end }}
  runAsNonRoot: true
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "platform.env" -}}
{{- range $name, $value := . }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{/* Init container of the small image. Call with (dict "root" $ "name" NAME "script" SH). */}}
{{- define "platform.tool" -}}
- name: {{ .name }}
  image: {{ include "platform.image" (dict "root" .root "image" .root.Values.tools.image) }}
  imagePullPolicy: IfNotPresent
  command: [sh, -ec, {{ .script | quote }}]
  {{- include "platform.containerSecurity" (dict "uid" 65532) | nindent 2 }}
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {cpu: 100m, memory: 64Mi}
{{- end }}

{{/* Init container that waits until the database greets, so that what needs it starts once. */}}
{{- define "platform.waitForDatabase" -}}
{{- $address := printf "%s %v" (include "platform.databaseHost" .root) .root.Values.database.port }}
{{- include "platform.tool" (dict "root" .root "name" "wait-for-database" "script"
  (printf "until timeout 3 nc %s </dev/null | grep -q .; do sleep 1; done" $address)) }}
{{- end }}

{{- define "platform.objectStoreSecret" -}}
{{ .Values.objectStore.existingSecret | default "object-store" }}
{{- end }}

{{- define "platform.databaseHost" -}}
{{ .Values.database.host | default "mysql" }}
{{- end }}

{{- define "platform.databaseSecret" -}}
{{ .Values.database.existingSecret | default "mysql" }}
{{- end }}

{{/* Environment variable from a Secret. Call with (list NAME SECRET KEY). */}}
{{- define "platform.secretEnv" -}}
- name: {{ index . 0 }}
  valueFrom: {secretKeyRef: {name: {{ index . 1 }}, key: {{ index . 2 }}}}
{{- end }}

{{/* Key of archived logs; Argo writes it and the web interface reads it. */}}
{{- define "platform.logKey" -}}
{{ "logs/{{workflow.namespace}}/{{workflow.name}}/{{workflow.creationTimestamp.Y}}/{{workflow.creationTimestamp.m}}/{{workflow.creationTimestamp.d}}/{{pod.name}}" }}
{{- end }}

{{/* Value that a key of a Secret has in the cluster, or a new one. Call with (list $ SECRET KEY LENGTH). */}}
{{- define "platform.password" -}}
{{- $root := index . 0 }}
{{- $data := (lookup "v1" "Secret" $root.Release.Namespace (index . 1)).data | default dict }}
{{- get $data (index . 2) | default (randAlphaNum (index . 3 | int) | b64enc) }}
{{- end }}

{{/* Volume claim. Call with (dict "root" $ "component" NAME "size" SIZE). */}}
{{- define "platform.claim" -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  {{- include "platform.metadata" (merge (dict "keep" true) .) | nindent 2 }}
spec:
  accessModes: [ReadWriteOnce]
  {{- with .root.Values.persistence.storageClass }}
  storageClassName: {{ . }}
  {{- end }}
  resources: {requests: {storage: {{ .size }}}}
{{- end }}

{{/* Init container that waits for KFP's API server: its controllers give up after a minute or two. */}}
{{- define "platform.waitForApiServer" -}}
{{- include "platform.tool" (dict "root" .root "name" "wait-for-api-server" "script"
  "until printf 'GET /apis/v2beta1/healthz HTTP/1.0\\r\\n\\r\\n' | timeout 3 nc ml-pipeline 8888 | grep -q ' 200 '; do sleep 1; done") }}
{{- end }}

{{/* Volumes of a KFP controller: the token that it shows to the API server. Call with the token's file name. */}}
{{- define "platform.kfpToken" -}}
- name: token
  projected:
    sources:
      - serviceAccountToken: {path: {{ . }}, audience: pipelines.kubeflow.org, expirationSeconds: 3600}
- name: tmp
  emptyDir: {}
{{- end }}

{{/* ServiceAccount, Role and RoleBinding of one name. Call with (dict "root" $ "component" NAME "rules" YAML). */}}
{{- define "platform.role" -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "platform.metadata" . | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  {{- include "platform.metadata" . | nindent 2 }}
rules:
  {{- .rules | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  {{- include "platform.metadata" . | nindent 2 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: {{ .component }}}
subjects:
  - {kind: ServiceAccount, name: {{ .component }}, namespace: {{ .root.Release.Namespace }}}
{{- end }}
