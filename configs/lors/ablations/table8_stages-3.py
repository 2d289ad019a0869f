# The paper does not give K for 3 stages: as for 6, a third of them have one group each, a third two, a third three.
_base_ = "../adamixer-lors_r50_100-queries_1x_coco.py"

model = dict(
    decoder=dict(
        num_stages=3,
        lors=dict(adaptive=dict(groups=[1, 2, 3])),
    )
)
