{{/* What Ray's processes are told about HAProxy: deploy/haproxy/environment.py, whose `environment` a test compares. */}}
{{- define "divisi.haproxyEnv" -}}
{{- if not .Values.haproxy.enabled -}}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "0"}
{{- else -}}
{{- $folder := "/run/divisi/haproxy" -}}
{{- $limits := .Values.divisi.limits | default dict -}}
{{- $answer := add (max ($limits.request_timeout_s | default 3600 | float64 | ceil | int) 3600) 60 -}}
- {name: RAY_SERVE_ENABLE_HA_PROXY, value: "1"}
- {name: RAY_SERVE_HAPROXY_BINARY_PATH, value: {{ $folder }}/haproxy}
- {name: RAY_SERVE_HAPROXY_CONFIG_FILE_LOC, value: {{ $folder }}/haproxy.cfg}
- {name: RAY_SERVE_HAPROXY_SOCKET_PATH, value: {{ $folder }}/admin.sock}
- {name: RAY_SERVE_HAPROXY_SERVER_STATE_BASE, value: {{ $folder }}}
- {name: RAY_SERVE_HAPROXY_SERVER_STATE_FILE, value: {{ $folder }}/server-state}
- {name: RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH, value: {{ $folder }}/metrics.sock}
- {name: RAY_SERVE_HAPROXY_METRICS_ENABLED, value: "0"}
- {name: RAY_SERVE_HAPROXY_NBTHREAD, value: "1"}
- {name: RAY_SERVE_HAPROXY_MAXCONN, value: "4096"}
- {name: RAY_SERVE_HAPROXY_TUNE_BUFSIZE, value: "69632"}
- {name: RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S, value: {{ $answer | quote }}}
- {name: RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S, value: {{ $answer | quote }}}
- {name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S, value: {{ $answer | quote }}}
- {name: RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER, value: 500ms}
- {name: RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER, value: 250ms}
- {name: RAY_SERVE_HAPROXY_HEALTH_CHECK_DOWNINTER, value: 250ms}
- {name: RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL, value: "6"}
- {name: RAY_SERVE_HAPROXY_HEALTH_CHECK_RISE, value: "1"}
- {name: RAY_SERVE_CONTROL_LOOP_INTERVAL_S, value: "0.25"}
- {name: RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S, value: "0.5"}
- {name: RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S, value: "5"}
- {name: RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S, value: "1"}
- {name: RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S, value: "1"}
- {name: RAY_SERVE_FALLBACK_PROXY_HTTP_PORT, value: "30000"}
- {name: RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT, value: "30001"}
- {name: RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT, value: "30300"}
{{- end -}}
{{- end }}
