"""The embedded world of coloured shapes: everything the FIRM pipeline needs, small enough for a laptop.

`scene` draws pictures, `vision` reads them pixel by pixel; neither knows of any task. `generation` is the text-to-image
task: its prompts, and pictures for curation. `editing` is the editing task, in the language of `instructions`: source
pictures, and edits of them for curation; `comparison` measures what differs between two pictures. `teacher` grades
pictures, `edit_teacher` edits, and both speak the chat protocol of a multimodal endpoint, which `serve` puts on HTTP.
`models` builds tiny models of the real classes, `pretrain` makes the shipped generators under `weights/`. The teacher
imitates the rubrics of the paper (sections 3.1, 3.2 and 3.4).
"""
