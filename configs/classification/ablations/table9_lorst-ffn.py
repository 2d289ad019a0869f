_base_ = "../deit-tiny-lors_cifar100.py"

model = dict(
    stacks=[dict(layers="network.blocks", targets=["mlp.*"], rank=32, init="paper", groups=[6, 4, 2] + [1] * 9)]
)
