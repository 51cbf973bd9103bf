"""`--plan`: what a run will hold and how fast it can be, from its configuration alone.

model.py     the run's model and adapter on the meta device, and what they are made of
step.py      what one micro-step allocates and computes, by running it on tensors without numbers
layouts.py   bytes of one rank for each way of spreading the model
speed.py     from which number of tokens streaming the frozen weights is hidden
advice.py    which layout, micro-batch and checkpointing to take
report.py    all of it, as a table and in sentences
"""
