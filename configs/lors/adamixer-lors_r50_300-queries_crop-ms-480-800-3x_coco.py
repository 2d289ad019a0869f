_base_ = "adamixer-lors_r50_100-queries_crop-ms-480-800-3x_coco.py"

model = dict(query_generator=dict(num_queries=300), test_cfg=dict(max_per_img=300))
