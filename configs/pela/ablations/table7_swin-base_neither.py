# Table 7, neither of the two losses: the classification loss alone. The paper's figure seems to be that of the
# factorised model before any training, which this prints:
# --cfg-options optim_wrapper.optimizer.lr=0 train_cfg.max_epochs=1 train_dataloader.num_batch_per_epoch=1
_base_ = "../pela-distiller_swin-base_imagenet.py"

model = dict(feature_loss=None, perturbation_loss=None)
