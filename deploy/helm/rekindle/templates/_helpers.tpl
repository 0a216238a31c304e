{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- define "rekindle.name" -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end -}}

{{- define "rekindle.labels" -}}
app.kubernetes.io/name: rekindle
app.kubernetes.io/instance: {{ include "rekindle.name" . }}
{{- end -}}

{{- /* The least with which a process is restored: see docs/kubernetes.md. */ -}}
{{- define "rekindle.restores" -}}
runAsUser: 0
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
  add: [SYS_ADMIN, NET_ADMIN, SYS_TIME, SYS_CHROOT, SETPCAP]
seccompProfile:
  type: RuntimeDefault
appArmorProfile:
  type: Unconfined
{{- end -}}

{{- define "rekindle.unprivileged" -}}
runAsUser: 1000
runAsGroup: 1000
runAsNonRoot: true
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- /* Variables of rekindle; those of the server are in the ConfigMap. */ -}}
{{- define "rekindle.environment" -}}
- name: HOME # where servers and compilers write, since the root is read-only
  value: /tmp
- name: REKINDLE_HOME
  value: /var/lib/rekindle/home
- name: REKINDLE_STATE
  value: /var/lib/rekindle/state
- name: REKINDLE_LOG_FORMAT
  value: json
- name: DOCKER_CONFIG
  value: /etc/rekindle/registry
{{- end -}}

{{- define "rekindle.mounts" -}}
- name: home
  mountPath: /var/lib/rekindle
- name: tmp
  mountPath: /tmp
- name: keys
  mountPath: /etc/rekindle/keys
  readOnly: true
- name: registry
  mountPath: /etc/rekindle/registry
  readOnly: true
{{- end -}}

{{- define "rekindle.volumes" -}}
- name: tmp
  emptyDir: {}
- name: keys
  configMap:
    name: {{ .Values.snapshot.keysConfigMap }}
- name: registry
  secret:
    secretName: {{ .Values.snapshot.registrySecret }}
    optional: true
{{- end -}}

{{- define "rekindle.model" -}}
- name: models
  persistentVolumeClaim:
    claimName: {{ .Values.server.models.claim }}
    readOnly: true
{{- end -}}

{{- define "rekindle.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.server.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.server.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "rekindle.probes" -}}
startupProbe:
  httpGet:
    path: /health
    port: http
  periodSeconds: 1
  failureThreshold: 900
readinessProbe:
  httpGet:
    path: /health
    port: http
  periodSeconds: 5
livenessProbe:
  httpGet:
    path: /health
    port: http
  periodSeconds: 10
  failureThreshold: 6
{{- end -}}
