{{- define "ftvm.name" -}}
{{ .Values.fullnameOverride | default .Release.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "ftvm.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
{{- end }}

{{/* Labels of every object. The chart's own go before commonLabels. */}}
{{- define "ftvm.labels" -}}
{{- include "ftvm.componentLabels" (list . "") }}
{{- end }}

{{/* Labels of an object that belongs to a component. Argument: a list of root and component. */}}
{{- define "ftvm.componentLabels" -}}
{{- $root := index . 0 -}}
{{- $own := dict
  "helm.sh/chart" (printf "%s-%s" $root.Chart.Name ($root.Chart.Version | replace "+" "_"))
  "app.kubernetes.io/part-of" $root.Chart.Name
  "app.kubernetes.io/instance" $root.Release.Name
  "app.kubernetes.io/version" $root.Chart.AppVersion
  "app.kubernetes.io/managed-by" $root.Release.Service
-}}
{{- with index . 1 }}
{{- $own = set $own "app.kubernetes.io/name" . }}
{{- end }}
{{- merge $own $root.Values.commonLabels | toYaml }}
{{- end }}

{{/* By these labels pods are selected: they never change. Argument: a list of root and component. */}}
{{- define "ftvm.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ index . 1 }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
{{- end }}

{{- define "ftvm.operator.name" -}}
{{ include "ftvm.name" . }}-operator
{{- end }}

{{- define "ftvm.nodeDaemon.name" -}}
{{ include "ftvm.name" . }}-node-daemon
{{- end }}

{{- define "ftvm.test.name" -}}
{{ include "ftvm.name" . }}-test
{{- end }}

{{- define "ftvm.uninstall.name" -}}
{{ include "ftvm.name" . }}-uninstall
{{- end }}

{{/* Not empty if guests may be connected to a bridge. Argument: a list of root and the bridge. */}}
{{- define "ftvm.bridgeIsAllowed" -}}
{{- $bridge := index . 1 -}}
{{- range (index . 0).Values.nodeDaemon.allowedBridges -}}
{{- if or (eq $bridge .) (and (hasSuffix "*" .) (hasPrefix (trimSuffix "*" .) $bridge)) }}yes{{ end -}}
{{- end -}}
{{- end }}

{{/* Annotations of what the test's pod needs: made before it, taken away after it. */}}
{{- define "ftvm.test.rights" -}}
helm.sh/hook: test
helm.sh/hook-weight: "-1"
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{/* Annotations of what the hook of `helm uninstall` needs: made before its Job, taken away after it, whatever came of it (unless the API server refused the Job itself). */}}
{{- define "ftvm.uninstall.rights" -}}
helm.sh/hook: pre-delete
helm.sh/hook-weight: "-1"
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}

{{/* What the API server calls a service account. Argument: a list of root and name. */}}
{{- define "ftvm.user" -}}
system:serviceaccount:{{ (index . 0).Release.Namespace }}:{{ index . 1 }}
{{- end }}

{{- define "ftvm.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Argument: a list of root, the component's name and its values. */}}
{{- define "ftvm.priorityClass" -}}
{{- $root := index . 0 -}}
{{- $name := (index . 2).priorityClassName | default (ternary (index . 1) "" $root.Values.priorityClasses.create) -}}
{{- with $name }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}

{{/* Binds a policy of the same name. Argument: a list of root and name. */}}
{{- define "ftvm.policyBinding" -}}
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata:
  name: {{ index . 1 }}
  labels:
    {{- include "ftvm.labels" (index . 0) | nindent 4 }}
spec:
  policyName: {{ index . 1 }}
  validationActions: [Deny]
{{- end }}

{{/* Variables of policies about a node-daemon's requests. Whatever a token does not say is the empty string, which no rule accepts. */}}
{{- define "ftvm.policyVariables" -}}
- name: node
  expression: >-
    has(request.userInfo.extra) && 'authentication.kubernetes.io/node-name' in request.userInfo.extra
    && size(request.userInfo.extra['authentication.kubernetes.io/node-name']) == 1
    ? request.userInfo.extra['authentication.kubernetes.io/node-name'][0] : ''
- name: labels
  expression: "has(object.metadata.labels) ? object.metadata.labels : {}"
- name: oldLabels
  expression: "has(oldObject.metadata.labels) ? oldObject.metadata.labels : {}"
- name: annotations
  expression: "has(object.metadata.annotations) ? object.metadata.annotations : {}"
- name: oldAnnotations
  expression: "has(oldObject.metadata.annotations) ? oldObject.metadata.annotations : {}"
{{- end }}

{{/* Owners and finalizers stay as they are. */}}
{{- define "ftvm.policyOwnersStay" -}}
- expression: >-
    (has(object.metadata.ownerReferences) ? object.metadata.ownerReferences : [])
    == (has(oldObject.metadata.ownerReferences) ? oldObject.metadata.ownerReferences : [])
    && (has(object.metadata.finalizers) ? object.metadata.finalizers : [])
    == (has(oldObject.metadata.finalizers) ? oldObject.metadata.finalizers : [])
  message: a node-daemon may not change owners or finalizers
{{- end }}
