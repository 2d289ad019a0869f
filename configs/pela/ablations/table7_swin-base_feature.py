# Table 7, the feature loss alone.
_base_ = "../pela-distiller_swin-base_imagenet.py"

model = dict(perturbation_loss=None)
