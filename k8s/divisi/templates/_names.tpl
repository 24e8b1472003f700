{{/* Names and labels. */}}

{{- define "divisi.name" -}}
{{- .Values.nameOverride | default .Chart.Name -}}
{{- end }}

{{/* Of the RayService, from which the operator makes longer names. */}}
{{- define "divisi.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $name = contains (include "divisi.name" .) .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name (include "divisi.name" .)) -}}
{{- end -}}
{{- if gt (len $name) 47 -}}
{{- fail (printf "fullnameOverride: KubeRay takes names of at most 47 characters, and %q has %d; give a shorter one, or a shorter release name" $name (len $name)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "fullnameOverride: %q is no name that KubeRay takes: lower-case letters, digits and hyphens, a letter first" $name) -}}
{{- end -}}
{{- $name -}}
{{- end }}

{{- define "divisi.selector" -}}
app.kubernetes.io/name: {{ include "divisi.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "divisi.labels" -}}
{{ include "divisi.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "divisi.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "divisi.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "divisi.fullname" .) "default" .Values.serviceAccount.create) -}}
{{- end }}
