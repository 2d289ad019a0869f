# Only the compressed classifier: to evaluate what extract_student.py writes, and to fine-tune (load_from) that or a
# checkpoint of vit_digits.py, which is compressed when it is loaded.
_base_ = "../classification/vit_digits.py"

model = dict(
    _delete_=True,
    type="PELAModel",
    model=_base_.model,  # noqa: F821
    ratio=2,
    omit=["norm", "head", "patch_embed"],
)
