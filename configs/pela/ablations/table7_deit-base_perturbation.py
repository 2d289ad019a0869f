# Table 7, the perturbation loss alone.
_base_ = "../pela-distiller_deit-base_imagenet.py"

model = dict(
    feature_loss=None,
    perturbation_loss=dict(_delete_=True, type="WeightPerturbationLoss", loss_weight=1.0, eps=0.0),
)
