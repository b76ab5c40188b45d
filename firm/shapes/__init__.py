"""The embedded world of coloured shapes: everything the FIRM pipeline needs, small enough for a laptop.

`world` draws pictures and makes prompts, `teacher` reads pictures pixel by pixel and speaks the chat protocol of a
multimodal endpoint, `serve` puts it on HTTP, `models` builds tiny models of the real classes, `pretrain` makes the
shipped generators under `weights/`. The teacher imitates the rubrics of the paper (sections 3.2 and 3.4).
"""
