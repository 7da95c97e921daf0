"""What a program would cost on a TPU pod, read from what the TPU compiler writes without one."""
