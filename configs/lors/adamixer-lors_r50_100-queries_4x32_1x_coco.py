# AdaMixer's own groups and points, 4 x 32, so that adamixer_to_lors.py can start from a published AdaMixer.
_base_ = "adamixer-lors_r50_100-queries_1x_coco.py"

model = dict(decoder=dict(stage=dict(num_groups=4, in_points=32)))
