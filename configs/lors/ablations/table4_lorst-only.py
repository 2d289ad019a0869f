# Table 4, LORST alone: every stage has its own generator of M and S, in AdaMixer's own 4 groups of 32 points.
_base_ = "../adamixer-lors_r50_100-queries_1x_coco.py"

model = dict(decoder=dict(stage=dict(num_groups=4, in_points=32), lors=dict(adaptive=None)))
