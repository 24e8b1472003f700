"""What stands around a layer's mixer and its experts, as one operation each."""
