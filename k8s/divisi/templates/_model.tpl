{{/* Where the model's files come from. Each takes (dict "root" $ "weights" BOOL), weights being false where only text is needed. */}}

{{- define "divisi.prefetchClaim" -}}
{{- .Values.model.claim.name | default (printf "%s-model" (include "divisi.fullname" .)) -}}
{{- end }}

{{- define "divisi.modelVolume" -}}
{{- $model := .root.Values.model -}}
{{- if eq $model.source "claim" }}
- name: model
  persistentVolumeClaim: {claimName: {{ $model.claim.name }}, readOnly: true}
{{- else if eq $model.source "prefetch" }}
- name: model
  persistentVolumeClaim: {claimName: {{ include "divisi.prefetchClaim" .root }}}
{{- else if eq $model.source "hostPath" }}
- name: model
  hostPath: {path: {{ $model.hostPath | quote }}, type: Directory}
{{- else if eq $model.source "nodeCache" }}
- name: model
  {{- if .weights }}
  hostPath: {path: {{ $model.hostPath | quote }}, type: Directory}
  {{- else }}
  emptyDir: {sizeLimit: 1Gi}
  {{- end }}
{{- end }}
{{- end }}

{{- define "divisi.modelMount" -}}
{{- $model := .Values.model -}}
{{- if ne $model.source "image" }}
- {name: model, mountPath: {{ $model.mountPath | quote }}, readOnly: true{{ with $model.claim.subPath }}, subPath: {{ . | quote }}{{ end }}}
{{- end }}
{{- end }}

{{/* Fills a folder, once: takes "root", "weights" and the "name" of the container. */}}
{{- define "divisi.prefetchContainer" -}}
{{- $values := .root.Values -}}
{{- $from := $values.model.prefetch -}}
- name: {{ .name }}
  image: {{ include "divisi.image" .root | quote }}
  imagePullPolicy: {{ $values.image.pullPolicy }}
  command: [python, -P, -m, divisi.deploy.prefetch]
  args:
    - --to={{ $values.divisi.model.model_dir }}
    {{- if $from.url }}
    - --url={{ $from.url }}
    {{- else }}
    - --endpoint={{ $from.endpoint }}
    - --repo={{ $from.repo }}
    - --revision={{ $from.revision }}
    {{- end }}
    - --connections={{ int $from.connections }}
    - --deadline={{ int $from.deadlineSeconds }}
    {{- if not .weights }}
    - --without-weights
    {{- end }}
    {{- if $values.model.token.secretName }}
    - --token-file=/etc/divisi/token/{{ $values.model.token.secretKey }}
    {{- end }}
  securityContext: {{- include "divisi.containerSecurity" (dict "ipcLock" false) | nindent 4 }}
  resources: {{- toYaml $from.resources | nindent 4 }}
  volumeMounts:
    - {name: model, mountPath: {{ $values.model.mountPath | quote }}{{ with $values.model.claim.subPath }}, subPath: {{ . | quote }}{{ end }}}
    - {name: tmp, mountPath: /tmp}
    {{- if $values.model.token.secretName }}
    - {name: hub-token, mountPath: /etc/divisi/token, readOnly: true}
    {{- end }}
{{- end }}

{{- define "divisi.tokenVolume" -}}
{{- with .Values.model.token.secretName }}
- name: hub-token
  secret: {secretName: {{ . }}, defaultMode: 0440}
{{- end }}
{{- end }}
