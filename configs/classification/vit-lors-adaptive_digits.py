# LORSA in place of LORST (appendix A.2 of the LORS paper): rank 3, with which the encoder is smaller than LORST's.
_base_ = "vit-lors_digits.py"

model = dict(stacks=[dict(_base_.model.stacks[0], kind="adaptive", rank=3)])  # noqa: F821
