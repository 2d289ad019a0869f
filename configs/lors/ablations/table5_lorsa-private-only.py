# Table 5, only private weights in channel and spatial mixing; the output projection keeps both parts.
_base_ = "../adamixer-lors_r50_100-queries_1x_coco.py"

model = dict(decoder=dict(lors=dict(adaptive=dict(shared=False))))
