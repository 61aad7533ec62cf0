"""What generation loses: likelihood and generated tasks, made here, for an original and its conversions."""
