# The digits' AdaMixer that knows 0 to 7 alone: in its pictures 8 and 9 are background. What is adapted to all ten.
_base_ = "../adamixer/adamixer_r18_digits.py"

metainfo = dict(classes=tuple("01234567"))
train_dataloader = dict(dataset=dict(metainfo=metainfo))
val_dataloader = dict(dataset=dict(metainfo=metainfo))
test_dataloader = val_dataloader

model = dict(decoder=dict(num_classes=8))
