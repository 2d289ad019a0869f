"""A trained AdaMixer in other forms: folded to plain, as a function of tensors, from the reference's names."""
