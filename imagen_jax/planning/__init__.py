"""Memory, time and cost of a stage on a pod, planned without the pod."""
