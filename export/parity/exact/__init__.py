"""What stands in the file, held to the checkpoint exactly: weights, attributes, scales, rotary tables by the papers' formulas."""
