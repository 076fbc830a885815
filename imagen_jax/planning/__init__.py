"""What a stage costs on a pod, before anybody pays for one."""
