# The runtime of configs in mmengine's new style: default_runtime.py with classes instead of names.
from mmengine.hooks import DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.visualization import LocalVisBackend

from mmdet_lors.datasets.evaluation import EvaluatedDataHook
from mmdet_lors.engine.checkpoint.hook import ReliableCheckpointHook
from mmdet_lors.engine.hooks import ServeFoldedHook
from mmdet_lors.engine.late_hooks import LateRuntimeInfoHook
from mmdet_lors.engine.log_line import ShortLogProcessor
from mmdet_lors.engine.non_finite import StopOnNonFiniteHook
from mmdet_lors.visualization import DetectionVisualizer, PicturesHook

default_scope = None
default_hooks = dict(
    runtime_info=dict(type=LateRuntimeInfoHook),
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=50),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=ReliableCheckpointHook, interval=1, max_keep_ckpts=3, save_best="coco/bbox_mAP"),
    sampler_seed=dict(type=DistSamplerSeedHook),
    visualization=dict(type=PicturesHook),
    evaluated_data=dict(type=EvaluatedDataHook),
)
custom_hooks = [dict(type=ServeFoldedHook), dict(type=StopOnNonFiniteHook)]
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
visualizer = dict(type=DetectionVisualizer, vis_backends=[dict(type=LocalVisBackend)], name="visualizer")
log_processor = dict(type=ShortLogProcessor, window_size=50, by_epoch=True)
log_level = "INFO"
load_from = None
resume = False
