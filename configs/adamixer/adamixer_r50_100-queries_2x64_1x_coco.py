# The groups and points with which LORS is trained, 2 x 64 instead of 4 x 32: the LORS paper says that they do not help.
_base_ = "adamixer_r50_100-queries_1x_coco.py"

model = dict(decoder=dict(stage=dict(num_groups=2, in_points=64)))
