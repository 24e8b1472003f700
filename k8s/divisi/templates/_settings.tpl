{{/* What the settings say, and the settings that the chart adds to them. */}}

{{/* The groups of pods that the topology has, and the processes of each, as JSON. */}}
{{- define "divisi.groups" -}}
{{- $gang := .Values.divisi.gang -}}
{{- $shards := int (($gang.expert_autoscaling | default dict).max | default (get $gang "expert_shards") | default 0) -}}
{{- $topology := $gang.topology | default (ternary "split" "local" (gt $shards 0)) -}}
{{- $workers := int (($gang.autoscaling | default dict).max | default (get $gang "attention_workers") | default 1) -}}
{{- $http := .Values.divisi.http | default dict -}}
{{- $groups := dict "ingress" (int (get $http "ingress_replicas" | default 1)) -}}
{{- if eq $topology "split" -}}
{{- $_ := set $groups "attention" $workers -}}
{{- $_ := set $groups "experts" (max $shards 1 | int) -}}
{{- else -}}
{{- $_ := set $groups "colocated" $workers -}}
{{- end -}}
{{- toJson $groups -}}
{{- end }}

{{/* Seconds that open answers have when a process is told to end. */}}
{{- define "divisi.grace" -}}
{{- $limits := .Values.divisi.limits | default dict -}}
{{- hasKey $limits "shutdown_grace_s" | ternary $limits.shutdown_grace_s 10 | float64 | ceil | int -}}
{{- end }}

{{/* Seconds from a pod's last order to its end: the grace, the last words of what outlasts it (8), Ray's own end, and a margin. */}}
{{- define "divisi.termination" -}}
{{- add (include "divisi.grace" .) 30 -}}
{{- end }}

{{- define "divisi.deletionDelay" -}}
{{- $least := include "divisi.termination" . | int -}}
{{- $given := .Values.upgrade.deletionDelaySeconds -}}
{{- if kindIs "invalid" $given -}}
{{- max $least 60 -}}
{{- else if lt (int $given) $least -}}
{{- fail (printf "upgrade.deletionDelaySeconds: %d would end the former cluster before its answers, which have divisi.limits.shutdown_grace_s and 30 s; give %d or more, or nothing" (int $given) $least) -}}
{{- else -}}
{{- int $given -}}
{{- end -}}
{{- end }}

{{/* Divisi's settings: those of the values, and files and places that the chart knows. */}}
{{- define "divisi.settings" -}}
{{- $settings := deepCopy .Values.divisi -}}
{{- $gang := $settings.gang -}}
{{- $placement := dict -}}
{{- range $group, $_ := include "divisi.groups" . | fromJson -}}
{{- $role := eq $group "colocated" | ternary "attention" $group -}}
{{- $_ := set $placement $role (dict "labels" (dict "divisi-role" $group)) -}}
{{- end -}}
{{- $_ := set $settings "placement" $placement -}}
{{- if .Values.secrets.apiKeys.secretName -}}
{{- $_ := set $settings "auth" (merge (dict "api_keys_file" (printf "/etc/divisi/keys/%s" .Values.secrets.apiKeys.secretKey)) ($settings.auth | default dict)) -}}
{{- end -}}
{{- if .Values.secrets.gang.secretName -}}
{{- $_ := set $gang "secret_file" (printf "/etc/divisi/gang/%s" .Values.secrets.gang.secretKey) -}}
{{- end -}}
{{- if .Values.secrets.tls.secretName -}}
{{- $_ := set $gang "tls" (dict "certificate" "/etc/divisi/tls/tls.crt" "key" "/etc/divisi/tls/tls.key" "ca" "/etc/divisi/tls/ca.crt") -}}
{{- end -}}
{{- $_ := set $settings "telemetry" (merge (dict "scrape_from_port" (include "divisi.scrapeFromPort" . | int)) ($settings.telemetry | default dict)) -}}
{{- $_ := set $settings "log" (merge ($settings.log | default dict) (dict "format" "json")) -}}
{{- include "divisi.block" $settings -}}
{{- end }}

{{/* The first of 64 ports, one for each process of a pod, that Prometheus may call. */}}
{{- define "divisi.scrapeFromPort" -}}9400{{- end }}

{{/* A mapping as YAML, with whole numbers in digits: Helm's own has 17179869184 as 1.7179869184e+10. */}}
{{- define "divisi.block" -}}
{{- $lines := list -}}
{{- range $key, $value := . -}}
{{- if and (kindIs "map" $value) $value -}}
{{- $lines = append $lines (printf "%s:\n%s" $key (include "divisi.block" $value | indent 2)) -}}
{{- else -}}
{{- $lines = append $lines (printf "%s: %s" $key (include "divisi.scalar" $value)) -}}
{{- end -}}
{{- end -}}
{{- join "\n" $lines -}}
{{- end }}

{{- define "divisi.scalar" -}}
{{- if kindIs "float64" . -}}
{{- eq (floor .) . | ternary (printf "%.0f" .) (toJson .) -}}
{{- else if kindIs "slice" . -}}
[{{ range $index, $item := . }}{{ if $index }}, {{ end }}{{ include "divisi.scalar" $item }}{{ end }}]
{{- else -}}
{{- toJson . -}}
{{- end -}}
{{- end }}

{{/* What must fit together in the values, and no schema can say. */}}
{{- define "divisi.check" -}}
{{- $gang := .Values.divisi.gang -}}
{{- if and (has ($gang.topology | default "split") (list "local" "colocated")) (get $gang "expert_shards") -}}
{{- fail (printf "divisi.gang.expert_shards: topology '%s' has the experts in its attention workers; leave it out" $gang.topology) -}}
{{- end -}}
{{- if and (eq ($gang.topology | default "split") "local") (gt (int (get $gang "attention_workers" | default 1)) 1) -}}
{{- fail "divisi.gang.attention_workers: topology 'local' is one process; use 'colocated' or 'split'" -}}
{{- end -}}
{{- if and $gang.autoscaling (has ($gang.topology | default (ternary "split" "local" (or (gt (int (get $gang "expert_shards" | default 0)) 0) (not (empty $gang.expert_autoscaling))))) (list "local" "colocated")) -}}
{{- fail "divisi.gang.autoscaling: only topology 'split' can do with fewer attention workers; use it, or leave autoscaling out" -}}
{{- end -}}
{{- if and $gang.expert_autoscaling (has ($gang.topology | default "split") (list "local" "colocated")) -}}
{{- fail (printf "divisi.gang.expert_autoscaling: topology '%s' has the experts in its attention workers; use 'split', or leave it out" $gang.topology) -}}
{{- end -}}
{{- $groups := include "divisi.groups" . | fromJson -}}
{{- $model := .Values.model -}}
{{- $dir := .Values.divisi.model.model_dir -}}
{{- if and (ne $model.source "image") (not (hasPrefix (printf "%s/" $model.mountPath) $dir)) -}}
{{- fail (printf "divisi.model.model_dir: %q is not below model.mountPath, %q, where model.source %q puts the files" $dir $model.mountPath $model.source) -}}
{{- end -}}
{{- if and (eq $model.source "claim") (not $model.claim.name) -}}
{{- fail "model.claim.name: model.source 'claim' needs the name of a claim that exists" -}}
{{- end -}}
{{- if and (has $model.source (list "hostPath" "nodeCache")) (not $model.hostPath) -}}
{{- fail (printf "model.hostPath: model.source '%s' needs a folder of the nodes" $model.source) -}}
{{- end -}}
{{- if has $model.source (list "prefetch" "nodeCache") -}}
{{- $from := $model.prefetch -}}
{{- if and $from.url (or $from.repo $from.revision) -}}
{{- fail "model.prefetch.url: give either it, or repo and revision" -}}
{{- else if and (not $from.url) (not $from.repo) -}}
{{- fail (printf "model.prefetch.repo: model.source '%s' needs repo and revision, or url" $model.source) -}}
{{- else if and $from.repo (not $from.revision) -}}
{{- fail "model.prefetch.revision: give the commit of model.prefetch.repo, 40 hexadecimal digits; a branch could change between two nodes" -}}
{{- end -}}
{{- end -}}
{{- range $group, $processes := $groups -}}
{{- $pods := include "divisi.pods" (dict "root" $ "group" $group) | fromJson -}}
{{- if lt (int $pods.max) (int $pods.needed) -}}
{{- fail (printf "groups.%s.maxReplicas: %d pods cannot hold the %d processes that divisi asks for; give %d or more, or nothing" $group (int $pods.max) (int $processes) (int $pods.needed)) -}}
{{- end -}}
{{- if gt (int $pods.min) (int $pods.max) -}}
{{- fail (printf "groups.%s.minReplicas: %d is more than groups.%s.maxReplicas, %d" $group (int $pods.min) $group (int $pods.max)) -}}
{{- end -}}
{{- if ne $group "ingress" -}}
{{- $accelerator := (get $.Values.groups $group).accelerator.resource -}}
{{- if and (eq $.Values.divisi.gang.device "cuda") (not $accelerator) -}}
{{- fail (printf "groups.%s.accelerator.resource: divisi.gang.device is 'cuda'; name the resource of one GPU, as nvidia.com/gpu" $group) -}}
{{- else if and (eq $.Values.divisi.gang.device "cpu") $accelerator -}}
{{- fail (printf "groups.%s.accelerator.resource: %s would lie idle, since divisi.gang.device is 'cpu'" $group $accelerator) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if eq .Values.upgrade.type "NewClusterWithIncrementalUpgrade" -}}
{{- if not .Values.autoscaling.enabled -}}
{{- fail "upgrade.type: NewClusterWithIncrementalUpgrade needs autoscaling.enabled" -}}
{{- end -}}
{{- if not .Values.upgrade.gatewayClassName -}}
{{- fail "upgrade.gatewayClassName: upgrade.type NewClusterWithIncrementalUpgrade needs the class of the gateway that moves the traffic" -}}
{{- end -}}
{{- if gt (int .Values.upgrade.stepSizePercent) (int .Values.upgrade.maxSurgePercent) -}}
{{- fail (printf "upgrade.stepSizePercent: %d is more than upgrade.maxSurgePercent, %d" (int .Values.upgrade.stepSizePercent) (int .Values.upgrade.maxSurgePercent)) -}}
{{- end -}}
{{- end -}}
{{- if .Values.gcsFaultTolerance.enabled -}}
{{- if not .Values.gcsFaultTolerance.redisAddress -}}
{{- fail "gcsFaultTolerance.redisAddress: give HOST:PORT of the Redis that keeps the head's state" -}}
{{- end -}}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.redis) -}}
{{- fail "networkPolicy.redis: name where gcsFaultTolerance.redisAddress is, as [{podSelector: {matchLabels: {app: redis}}}]; else nothing may reach it" -}}
{{- end -}}
{{- range $name, $forbidden := dict "RAY_REDIS_ADDRESS" "redisAddress" "REDIS_PASSWORD" "redisPassword" "REDIS_USERNAME" "redisUsername" -}}
{{- range $.Values.head.extraEnv -}}
{{- if eq .name $name -}}{{- fail (printf "head.extraEnv: KubeRay refuses %s beside gcsFaultTolerance; give gcsFaultTolerance.%s" $name $forbidden) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled .Values.networkPolicy.enabled (not .Values.networkPolicy.apiServer) -}}
{{- fail "networkPolicy.apiServer: autoscaling.enabled has the head call the Kubernetes API; name its addresses, as [{ipBlock: {cidr: 10.96.0.1/32}}]" -}}
{{- end -}}
{{- range $.Values.head.extraEnv -}}
{{- if eq .name "RAY_enable_autoscaler_v2" -}}{{- fail "head.extraEnv: RAY_enable_autoscaler_v2 is set by KubeRay; leave it out, and use autoscaling.enabled" -}}{{- end -}}
{{- end -}}
{{- $auth := .Values.divisi.auth | default dict -}}
{{- if and .Values.podMonitor.enabled .Values.secrets.apiKeys.secretName (eq (toString $auth.metrics_open) "false") -}}
{{- fail "divisi.auth.metrics_open: Prometheus has no key, and asks /metrics/targets for what to scrape; leave it out, or turn podMonitor.enabled off" -}}
{{- end -}}
{{- if and .Values.route.gateway.enabled (not .Values.route.gateway.parentRefs) -}}
{{- fail "route.gateway.parentRefs: name the Gateway, as [{name: public, namespace: gateways}]" -}}
{{- end -}}
{{- end }}

{{/* Of a group: pods that the settings may need, those of the beginning, at least and at most, as JSON. Ray's autoscaler starts
     what autoscaling and expert_autoscaling ask for; without it the pods of all ranks are there, some without one. */}}
{{- define "divisi.pods" -}}
{{- $values := get .root.Values.groups .group -}}
{{- $processes := get (include "divisi.groups" .root | fromJson) .group | int -}}
{{- $each := int ($values.ranksPerPod | default 1) -}}
{{- $needed := div (add $processes (sub $each 1)) $each -}}
{{- $first := $needed -}}
{{- $least := $needed -}}
{{- $gang := .root.Values.divisi.gang -}}
{{- $scaling := get (dict "attention" $gang.autoscaling "experts" $gang.expert_autoscaling) .group -}}
{{- if and $scaling .root.Values.autoscaling.enabled -}}
{{- $least = div (add (int ($scaling.min | default 1)) (sub $each 1)) $each -}}
{{- $begins := eq .group "experts" | ternary (get $gang "expert_shards") "" | default $scaling.min | default 1 -}}
{{- $first = div (add (int $begins) (sub $each 1)) $each -}}
{{- end -}}
{{- $min := kindIs "invalid" $values.minReplicas | ternary $least $values.minReplicas -}}
{{- $max := kindIs "invalid" $values.maxReplicas | ternary (max $needed (int $min)) $values.maxReplicas -}}
{{- dict "needed" $needed "first" (max (int $first) (int $min)) "min" (int $min) "max" (int $max) | toJson -}}
{{- end }}

{{- define "divisi.redisPort" -}}
{{- $port := regexFind "[0-9]+$" .Values.gcsFaultTolerance.redisAddress -}}
{{- if not $port -}}
{{- fail (printf "gcsFaultTolerance.redisAddress: %q is not HOST:PORT" .Values.gcsFaultTolerance.redisAddress) -}}
{{- end -}}
{{- $port -}}
{{- end }}

{{/* The model's name in the API. */}}
{{- define "divisi.servedName" -}}
{{- $named := (.Values.divisi.http | default dict).served_model_name -}}
{{- if kindIs "slice" $named -}}
{{- first $named | default (base .Values.divisi.model.model_dir) -}}
{{- else -}}
{{- $named | default (base .Values.divisi.model.model_dir) | splitList "," | first | trim -}}
{{- end -}}
{{- end }}
