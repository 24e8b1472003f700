{{/* The pods of the Ray cluster. Each takes "root", the "group" ("head" too) and its "values". */}}

{{- define "divisi.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int .Values.podSecurity.runAsUser }}
runAsGroup: {{ int .Values.podSecurity.runAsGroup }}
fsGroup: {{ int .Values.podSecurity.fsGroup }}
fsGroupChangePolicy: {{ .Values.podSecurity.fsGroupChangePolicy }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "divisi.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
  {{- if .ipcLock }}
  add: [IPC_LOCK]
  {{- end }}
{{- end }}

{{- define "divisi.podLabels" -}}
{{ include "divisi.labels" .root }}
app.kubernetes.io/component: {{ .group }}
{{- with .values.podLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "divisi.volumes" -}}
{{- $values := .root.Values -}}
- {name: tmp, emptyDir: {sizeLimit: {{ $values.scratch.tmpSize }}}}
- {name: run, emptyDir: {medium: Memory, sizeLimit: 64Mi}}
- {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ .values.shmSize }}}}
{{- include "divisi.modelVolume" (dict "root" .root "weights" (not (has .group (list "head" "ingress")))) }}
{{- if eq $values.model.source "nodeCache" }}{{ include "divisi.tokenVolume" .root }}{{ end }}
{{- with $values.secrets.apiKeys.secretName }}
- {name: api-keys, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- with $values.secrets.gang.secretName }}
- {name: gang-secret, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- with $values.secrets.tls.secretName }}
- {name: gang-tls, secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- with .values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "divisi.mounts" -}}
{{- $values := .root.Values -}}
- {name: tmp, mountPath: /tmp}
- {name: run, mountPath: /run/divisi}
- {name: shm, mountPath: /dev/shm}
{{- include "divisi.modelMount" .root }}
{{- if $values.secrets.apiKeys.secretName }}
- {name: api-keys, mountPath: /etc/divisi/keys, readOnly: true}
{{- end }}
{{- if $values.secrets.gang.secretName }}
- {name: gang-secret, mountPath: /etc/divisi/gang, readOnly: true}
{{- end }}
{{- if $values.secrets.tls.secretName }}
- {name: gang-tls, mountPath: /etc/divisi/tls, readOnly: true}
{{- end }}
{{- with .values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Before Ray: the folder of HAProxy's, and the model, where a Job or the pod itself has to fetch it. */}}
{{- define "divisi.initContainers" -}}
{{- $values := .root.Values -}}
{{- if $values.haproxy.enabled }}
- name: haproxy
  image: {{ include "divisi.image" .root | quote }}
  imagePullPolicy: {{ $values.image.pullPolicy }}
  command: [python, -P, -m, divisi.deploy.haproxy.pod]
  args: ["0.0.0.0", "8000", /run/divisi/haproxy]
  securityContext: {{- include "divisi.containerSecurity" (dict "ipcLock" false) | nindent 4 }}
  resources:
    requests: {cpu: 100m, memory: 128Mi}
    limits: {memory: 512Mi}
  volumeMounts:
    - {name: tmp, mountPath: /tmp}
    - {name: run, mountPath: /run/divisi}
{{- end }}
{{- if eq $values.model.source "prefetch" }}
- name: model
  image: {{ include "divisi.image" .root | quote }}
  imagePullPolicy: {{ $values.image.pullPolicy }}
  command: [python, -P, -m, divisi.deploy.prefetch]
  args: [--wait, "--to={{ $values.divisi.model.model_dir }}", "--deadline={{ int $values.model.prefetch.deadlineSeconds }}"]
  securityContext: {{- include "divisi.containerSecurity" (dict "ipcLock" false) | nindent 4 }}
  resources:
    requests: {cpu: 100m, memory: 128Mi}
    limits: {memory: 512Mi}
  volumeMounts: [{name: tmp, mountPath: /tmp}, {{ include "divisi.modelMount" .root | trim | trimPrefix "- " }}]
{{- else if eq $values.model.source "nodeCache" }}
{{ include "divisi.prefetchContainer" (dict "root" .root "name" "model" "weights" (not (has .group (list "head" "ingress")))) }}
{{- end }}
{{- end }}

{{- define "divisi.env" -}}
- {name: HOME, value: /tmp/home}
- {name: PYTHONDONTWRITEBYTECODE, value: "1"}
- {name: RAY_worker_niceness, value: "0"}
{{ include "divisi.haproxyEnv" .root }}
{{- with .values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "divisi.resources" -}}
{{- $resources := deepCopy .values.resources -}}
{{- $limits := $resources.limits | default dict -}}
{{- $requests := $resources.requests | default dict -}}
{{- with (.values.accelerator | default dict).resource -}}
{{- $_ := set $limits . (toString (int $.values.ranksPerPod)) -}}
{{- $_ := set $requests . (toString (int $.values.ranksPerPod)) -}}
{{- end -}}
{{- range $name, $amount := .values.extraResources -}}
{{- $_ := set $limits $name (toString $amount) -}}
{{- $_ := set $requests $name (toString $amount) -}}
{{- end -}}
{{- $_ := set $resources "limits" $limits -}}
{{- $_ := set $resources "requests" $requests -}}
{{- toYaml $resources -}}
{{- end }}

{{- define "divisi.spread" -}}
{{- if .values.topologySpreadConstraints -}}
{{- toYaml .values.topologySpreadConstraints -}}
{{- else if eq .group "ingress" -}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels: {{- include "divisi.selector" .root | nindent 6 }}
      app.kubernetes.io/component: ingress
{{- end -}}
{{- end }}

{{/* Of worker pods. The operator's own readiness probe asks for Serve's proxy, which there is none of beside experts. */}}
{{- define "divisi.probes" -}}
{{- $raylet := "wget --tries 1 -T 4 -q -O- http://localhost:52365/api/local_raylet_healthz | grep success" -}}
startupProbe:
  exec: {command: [bash, -c, {{ $raylet | quote }}]}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ div (add (int .root.Values.probes.startupSeconds) 4) 5 }}
readinessProbe:
  {{- if eq .group "ingress" }}
  httpGet: {path: /v1/health/ready, port: serve}
  failureThreshold: 2
  {{- else if eq .root.Values.upgrade.type "NewClusterWithIncrementalUpgrade" }}
  exec: {command: [bash, -c, {{ printf "%s && wget --tries 1 -T 4 -q -O- http://localhost:8000/v1/health/ready" $raylet | quote }}]}
  failureThreshold: 3
  {{- else }}
  exec: {command: [bash, -c, {{ $raylet | quote }}]}
  failureThreshold: 3
  {{- end }}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end }}

{{- define "divisi.pod" -}}
{{- $values := .root.Values -}}
metadata:
  labels: {{- include "divisi.podLabels" . | nindent 4 }}
  {{- with .values.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- if not (and (eq .group "head") $values.autoscaling.enabled) }}
  automountServiceAccountToken: false
  serviceAccountName: {{ include "divisi.serviceAccount" .root }}
  {{- end }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "divisi.termination" .root }}
  securityContext: {{- include "divisi.podSecurity" .root | nindent 4 }}
  {{- with $values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .values.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with merge (dict) .values.nodeSelector ((.values.accelerator | default dict).selector | default dict) }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "divisi.spread" . }}
  topologySpreadConstraints: {{- . | nindent 4 }}
  {{- end }}
  {{- with include "divisi.initContainers" . | trim }}
  initContainers: {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: ray-{{ eq .group "head" | ternary "head" "worker" }}
      image: {{ include "divisi.image" .root | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      securityContext: {{- include "divisi.containerSecurity" (dict "ipcLock" .values.ipcLock) | nindent 8 }}
      resources: {{- include "divisi.resources" . | nindent 8 }}
      ports:
        - {name: serve, containerPort: 8000}
        - {name: metrics, containerPort: 8080}
        {{- if eq .group "head" }}
        - {name: gcs, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: as-metrics, containerPort: 44217}
        - {name: dash-metrics, containerPort: 44227}
        {{- end }}
      env: {{- include "divisi.env" . | nindent 8 }}
      {{- if ne .group "head" }}
      {{- include "divisi.probes" . | nindent 6 }}
      lifecycle:
        preStop:
          exec: {command: [python, -P, -m, divisi.deploy.leave_node, "--within", {{ add (include "divisi.grace" .root) 15 | quote }}]}
      {{- end }}
      volumeMounts: {{- include "divisi.mounts" . | nindent 8 }}
  volumes: {{- include "divisi.volumes" . | nindent 4 }}
{{- end }}
