_base_ = "../adamixer-lors_r50_100-queries_1x_coco.py"

model = dict(decoder=dict(lors=dict(static=dict(rank=4))))
