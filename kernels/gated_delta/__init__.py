"""The gated delta rule over state slots with a replay ring."""
