# Table 7, the perturbation loss alone.
_base_ = "../pela-distiller_swin-base_imagenet.py"

model = dict(feature_loss=None)
