"""What `suite=tune` times: each operator forward and backward at the size that a row is for."""
