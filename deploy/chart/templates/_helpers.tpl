{{- define "hermes.labels" -}}
app.kubernetes.io/name: hermes
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "hermes.controller.selector" -}}
app.kubernetes.io/name: hermes
app.kubernetes.io/component: controller
{{- end }}

{{- define "hermes.node.selector" -}}
app.kubernetes.io/name: hermes
app.kubernetes.io/component: node
{{- end }}

{{- define "hermes.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "hermes.imagePullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
{{- range . }}
  - name: {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- /* -v as often as it is wanted, in front of the command. */ -}}
{{- define "hermes.verbosity" -}}
{{- if . -}}
- -{{ repeat (int .) "v" }}
{{- end }}
{{- end }}

{{- /* What the schema cannot say. */ -}}
{{- define "hermes.validate" -}}
{{- $artifacts := .Values.controller.artifacts -}}
{{- if and (eq $artifacts.kind "objectStore") (not $artifacts.place) -}}
{{- fail "controller.artifacts.place: give the bucket's address, such as s3://bucket/hermes" -}}
{{- end -}}
{{- if and (eq $artifacts.kind "persistentVolumeClaim") (not $artifacts.existingClaim) (gt (int .Values.controller.replicas) 1) (ne $artifacts.accessMode "ReadWriteMany") -}}
{{- fail "controller.artifacts.accessMode: several replicas need a volume that nodes share (ReadWriteMany); or set controller.replicas to 1, or use an objectStore" -}}
{{- end -}}
{{- $registries := .Values.node.registries -}}
{{- if ne (empty $registries.credentialProviderConfig) (empty $registries.credentialProviderBinDir) -}}
{{- fail "node.registries: give credentialProviderConfig and credentialProviderBinDir, or neither" -}}
{{- end -}}
{{- if and .Values.controller.hostNetwork (eq (int .Values.controller.metricsPort) (int .Values.node.metricsPort)) -}}
{{- fail "controller.metricsPort: is also node.metricsPort, and both are on the node's network with controller.hostNetwork" -}}
{{- end -}}
{{- end }}
