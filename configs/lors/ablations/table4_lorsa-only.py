# Table 4, LORSA alone: every stage has its own output projection.
_base_ = "../adamixer-lors_r50_100-queries_1x_coco.py"

model = dict(decoder=dict(lors=dict(static=None)))
