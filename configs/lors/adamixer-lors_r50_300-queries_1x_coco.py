_base_ = "adamixer-lors_r50_100-queries_1x_coco.py"

model = dict(query_generator=dict(num_queries=300), test_cfg=dict(max_per_img=300))
