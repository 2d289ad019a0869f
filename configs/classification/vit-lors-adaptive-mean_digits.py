# As vit-lors-adaptive_digits.py, with one core E for an image, from the mean of its tokens.
_base_ = "vit-lors-adaptive_digits.py"

model = dict(stacks=[dict(_base_.model.stacks[0], condition="mean")])  # noqa: F821
