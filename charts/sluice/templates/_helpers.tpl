{{- /* Arguments of these: a dict of root (the chart's context), component, and values (that component's). */ -}}

{{- define "sluice.selector" -}}
app.kubernetes.io/name: sluice
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "sluice.labels" -}}
{{- $own := include "sluice.selector" . | fromYaml -}}
{{- $_ := set $own "app.kubernetes.io/version" .root.Chart.AppVersion -}}
{{- $_ := set $own "app.kubernetes.io/managed-by" .root.Release.Service -}}
{{- $_ := set $own "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_") -}}
{{- toYaml (merge $own .root.Values.commonLabels) -}}
{{- end }}

{{- /* Without the chart's version: a new chart with the same images restarts nothing. Ours win, because selectors need them. */ -}}
{{- define "sluice.podLabels" -}}
{{- $own := include "sluice.selector" . | fromYaml -}}
{{- $_ := set $own "app.kubernetes.io/version" .root.Chart.AppVersion -}}
{{- if eq .component "fleet" }}{{- /* Makes it a member of the fleet. */}}{{- $_ := set $own "sluice.dev/fleet" "default" -}}{{- end -}}
{{- toYaml (merge $own .values.podLabels .root.Values.commonLabels) -}}
{{- end }}

{{- /* Argument port beside the others. */ -}}
{{- define "sluice.podAnnotations" -}}
{{- $own := dict "kubectl.kubernetes.io/default-container" .container -}}
{{- if and .root.Values.scrapeAnnotations (not .root.Values.podMonitor.enabled) -}}
{{- $_ := set $own "prometheus.io/scrape" "true" -}}
{{- $_ := set $own "prometheus.io/port" .port -}}
{{- $_ := set $own "prometheus.io/path" "/metrics" -}}
{{- end -}}
{{- toYaml (mergeOverwrite $own .values.podAnnotations) -}}
{{- end }}

{{- /* Arguments: root and name (controller or proxy). */ -}}
{{- define "sluice.image" -}}
{{- $image := index .root.Values.image .name -}}
{{- $reference := printf "%s/%s" .root.Values.image.registry $image.repository -}}
{{- if $image.digest -}}
{{ $reference }}@{{ $image.digest }}
{{- else -}}
{{ $reference }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{- define "sluice.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "sluice.address" -}}
sluice-controller.{{ .Release.Namespace }}.svc:18000
{{- end }}

{{- define "sluice.controllerId" -}}
spiffe://{{ .Values.trustDomain }}/ns/{{ .Release.Namespace }}/sa/{{ .Values.controller.serviceAccount.name }}
{{- end }}

{{- define "sluice.metricsServer" -}}
{{- if .Values.metricsServer -}}
{{ .Values.metricsServer }}
{{- else if .Values.prometheus.install -}}
http://sluice-prometheus.{{ .Release.Namespace }}.svc:9090
{{- end -}}
{{- end }}

{{- /* With podSecurityContext, the restricted Pod Security standard. */ -}}
{{- define "sluice.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "sluice.placement" -}}
{{- $placement := dict }}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "priorityClassName" }}
{{- with index $.values $key }}
{{- $_ := set $placement $key . }}
{{- end }}
{{- end }}
{{- with $placement }}
{{- toYaml . }}
{{- end }}
{{- end }}

{{- /* Only Pods of the same version count, or an update would pile them up. Zones are preferred by affinity: the scheduler leaves
       nodes without the label of one constraint out of all of them, and many clusters have no zones. */ -}}
{{- define "sluice.spread" -}}
{{- $selector := include "sluice.selector" . | fromYaml -}}
{{- if not .values.affinity -}}
affinity:
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: topology.kubernetes.io/zone
          labelSelector:
            matchLabels:
              {{- toYaml $selector | nindent 14 }}
          matchLabelKeys: [pod-template-hash]
{{- end }}
{{- with .values.topologySpreadConstraints }}
topologySpreadConstraints:
{{- range . }}
{{- $constraint := deepCopy . }}
{{- if not $constraint.labelSelector }}
{{- $_ := set $constraint "labelSelector" (dict "matchLabels" $selector) }}
{{- if not (hasKey $constraint "matchLabelKeys") }}
{{- $_ := set $constraint "matchLabelKeys" (list "pod-template-hash") }}
{{- end }}
{{- end }}
  - {{ toYaml $constraint | nindent 4 | trim }}
{{- end }}
{{- end }}
{{- end }}

{{- /* Where a proxy has its token and the trust bundle from. The controller makes the ConfigMap when it first leads; Pods wait for it. */ -}}
{{- define "sluice.identityVolume" -}}
name: identity
projected:
  sources:
    - serviceAccountToken:
        audience: sluice.dev
        expirationSeconds: 3600
        path: token
    - configMap:
        name: sluice-trust-bundle
        items:
          - key: ca.crt
            path: ca.crt
{{- end }}

{{- /* How a proxy finds the controllers, and knows that it is them. */ -}}
{{- define "sluice.proxyEnv" -}}
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: POD_NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: SLUICE_CONTROLLER
  value: {{ include "sluice.address" . }}
- name: SLUICE_CONTROLLER_ID
  value: {{ include "sluice.controllerId" . }}
- name: SLUICE_TOKEN
  value: /var/run/secrets/sluice.dev/token
- name: SLUICE_TRUST_BUNDLE
  value: /var/run/secrets/sluice.dev/ca.crt
- name: SLUICE_LOG
  value: {{ .Values.logLevel | quote }}
- name: SLUICE_LOG_FORMAT
  value: {{ .Values.logFormat | quote }}
{{- end }}
