"""The embedded world of coloured shapes: everything the FIRM pipeline needs, small enough for a laptop.

`scene` draws pictures, `vision` reads them pixel by pixel; neither knows of any task. `generation` is the text-to-image
task: its prompts, and pictures for curation. `teacher` grades pictures and speaks the chat protocol of a multimodal
endpoint, `serve` puts it on HTTP, `models` builds tiny models of the real classes, `pretrain` makes the shipped
generators under `weights/`. The teacher imitates the rubrics of the paper (sections 3.2 and 3.4).
"""
