# As for detection, but without pictures of boxes, and with the best checkpoint chosen by accuracy.
_base_ = "default_runtime.py"

custom_imports = dict(imports=["mmdet_lors", "mmdet_lors.classification"])
default_hooks = dict(
    _delete_=True,
    runtime_info=dict(type="LateRuntimeInfoHook"),
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="ReliableCheckpointHook", interval=10, max_keep_ckpts=3, save_best="accuracy/top1"),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    evaluated_data=dict(type="EvaluatedDataHook"),
)
visualizer = dict(type="Visualizer")
