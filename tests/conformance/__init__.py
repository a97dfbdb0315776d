"""Every architecture beside its own library: the same pixels, the same logits, or a refusal that says why."""
