_base_ = [
    "../_base_/models/deit-tiny.py",
    "../_base_/datasets/cifar100.py",
    "../_base_/schedules/deit_300-epochs.py",
    "../_base_/classification_runtime.py",
]
