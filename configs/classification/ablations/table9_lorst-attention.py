_base_ = "../deit-tiny-lors_cifar100.py"

model = dict(
    stacks=[dict(layers="network.blocks", targets=["attn.*"], rank=32, init="paper", groups=[1] * 9 + [2, 4, 6])]
)
