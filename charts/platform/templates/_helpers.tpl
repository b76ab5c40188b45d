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

{{/* Metadata of a component's pods. Call with (dict "root" $ "component" NAME), and "checksum" TEXT where a change restarts them. */}}
{{- define "platform.podMetadata" -}}
{{- $own := get .root.Values.components .component | default dict -}}
labels:
  {{- include "platform.podLabels" . | nindent 2 }}
  {{- with merge (dict) ($own.labels | default dict) .root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $annotations := merge (dict) ($own.annotations | default dict) .root.Values.podAnnotations }}
{{- with .checksum }}{{ $_ := set $annotations "checksum/config" (sha256sum .) }}{{ end }}
{{- with $annotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
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
{{ .root.Values.imageRegistry | default .image.registry | trimSuffix "/" }}/{{ .image.repository }}
{{- if .image.digest }}@{{ .image.digest }}{{ else }}:{{ $tag }}{{ end }}
{{- end }}

{{/* What every pod of this chart has in its spec, restricted Pod Security first. Call with (dict "root" $ "component" NAME), and "user" UID,
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
{{- $own := get .root.Values.components .component | default dict }}
{{- range $key := list "priorityClassName" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
{{- with get $own $key | default (get $.root.Values $key) }}
{{ $key }}: {{ toJson . }}
{{- end }}
{{- end }}
{{- end }}

{{/* How many pods a Deployment has. Call with (dict "root" $ "component" NAME). */}}
{{- define "platform.replicas" -}}
{{ dig .component "replicas" 1 .root.Values.components }}
{{- end }}

{{/* The authority of caBundle: a volume, and where containers find it. */}}
{{- define "platform.caVolume" -}}
{{- with .Values.caBundle }}
{{- if .existingSecret }}
- name: ca
  secret: {secretName: {{ .existingSecret }}, items: [{key: {{ .key }}, path: {{ .key }}}]}
{{- end }}
{{- end }}
{{- end }}

{{/* Where programs in Go find the authorities that they trust, the public ones first. */}}
{{- define "platform.caDirectories" -}}
/etc/ssl/certs:/etc/firm/ca
{{- end }}

{{- define "platform.caMount" -}}
{{- if .Values.caBundle.existingSecret }}
- {name: ca, mountPath: /etc/firm/ca, readOnly: true}
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

{{/* Keys of steps and jobs for the object store; keys of KFP's and Argo's own files; keys of MinIO's administrator. */}}
{{- define "platform.objectStoreSecret" -}}
{{ .Values.objectStore.existingSecret | default "object-store" }}
{{- end }}

{{- define "platform.pipelinesSecret" -}}
{{- $store := .Values.objectStore }}
{{- $store.pipelinesSecret | default $store.existingSecret | default (ternary "object-store-kfp" "object-store" .Values.minio.enabled) }}
{{- end }}

{{- define "platform.minioSecret" -}}
{{ .Values.minio.existingSecret | default "minio" }}
{{- end }}

{{- define "platform.certificateSecret" -}}
{{ .Values.trainingOperator.certificate.existingSecret | default "training-operator-webhook-cert" }}
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

{{/* Fails where no cluster is seen and each render would make another secret. Call with (list $ SECRET VALUES). */}}
{{- define "platform.madeOnce" -}}
{{- $root := index . 0 }}
{{- if not (or (lookup "v1" "Namespace" "" $root.Release.Namespace) (lookup "v1" "Namespace" "" "kube-system")) }}
{{- fail (printf "Secret %s: without a cluster (`helm template`, Argo CD) each render would make another one. Make it yourself and set %s: see ci/gitops-values.yaml, and \"GitOps\" in the README" (index . 1) (index . 2)) }}
{{- end }}
{{- end }}

{{/* Secret whose values are given, found in the cluster, or new. Call with (dict "root" $ "component" NAME
"lengths" (dict KEY LENGTH) "given" (dict KEY VALUE) "instead" VALUES). */}}
{{- define "platform.secret" -}}
{{- $data := (lookup "v1" "Secret" .root.Release.Namespace .component).data | default dict }}
apiVersion: v1
kind: Secret
metadata:
  {{- include "platform.metadata" (merge (dict "keep" true) .) | nindent 2 }}
data:
  {{- range $key, $length := .lengths }}
  {{- $value := get ($.given | default dict) $key | b64enc | default (get $data $key) }}
  {{- if not $value }}
  {{- include "platform.madeOnce" (list $.root $.component $.instead) }}
  {{- $value = randAlphaNum (int $length) | b64enc }}
  {{- end }}
  {{ $key }}: {{ $value }}
  {{- end }}
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

{{/* Rights to elect one of several pods. Call with (dict "root" $ "component" DEPLOYMENT "lease" NAME). */}}
{{- define "platform.rules.leader" -}}
{{- if gt (include "platform.replicas" . | int) 1 }}
# Which of its pods leads; a right to create cannot name the object.
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [{{ .lease }}]
  verbs: [get, update]
{{- end }}
{{- end }}
