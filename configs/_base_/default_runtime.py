_base_ = "mmdet::_base_/default_runtime.py"

custom_imports = dict(imports=["mmdet_lors"], allow_failed_imports=False)
default_hooks = dict(
    runtime_info=dict(type="LateRuntimeInfoHook"),
    checkpoint=dict(type="ReliableCheckpointHook", max_keep_ckpts=3, save_best="coco/bbox_mAP"),
    evaluated_data=dict(type="EvaluatedDataHook"),
    visualization=dict(type="PicturesHook"),
)
log_processor = dict(type="ShortLogProcessor")
visualizer = dict(type="DetectionVisualizer")
custom_hooks = [dict(type="ServeFoldedHook"), dict(type="StopOnNonFiniteHook")]
