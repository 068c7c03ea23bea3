"""The texts that a file and its source are run on, once that is written (runtime/file_check.py).

The long one is what the quality sheet's figures are of: about 800 tokens, written for this purpose.
Nothing is calibrated on it. Prose, facts, talk, code and a second language, each long enough for a
model to see what it is; windows are cut from the beginning, so that the start counts most.
"""

SHORT_TEXT = (
    "The river rises in the mountains, crosses three countries and reaches the sea near a small "
    "town where, in 1869, the first bridge of iron was built. People say that"
)
LONG_TEXT = """\
The lighthouse keeper climbed the stairs twice a day, once to light the lamp and once to put it \
out, and in thirty years he had never counted them. His daughter counted them on her first visit. \
There were two hundred and eleven, she said, and the last nine were so worn that water stood in \
them after rain. He nodded, as if she had told him the age of an old friend, and went on cleaning \
the glass. Below them the tide was turning. A fishing boat came round the point with its engine \
off, drifting, while two men in yellow coats pulled a net over the side, hand over hand, and did \
not look up.

Granite forms when molten rock cools slowly, several kilometres below the surface of the earth. \
Because it cools slowly its crystals have time to grow, and they can be seen with the naked eye: \
grey quartz, pink or white feldspar, and flakes of dark mica. Basalt has much the same history but \
reaches the surface as lava and cools within days, so its grains are too small to be seen. Both \
are heavier than water by a factor of about 2.7 to 3.0. Where a river cuts through granite the \
valley is usually narrow, with steep walls; where it meets softer stone, such as limestone or \
shale, the valley opens and the river begins to wander from side to side.

"Is the train late again?" asked the woman with the blue suitcase.
"Only twenty minutes," the man behind the counter said. "It left Vienna on time, but there was \
snow on the line near Salzburg."
"Then I will miss the boat."
"There is another one at six. If you buy the ticket here, it costs 14 euros instead of 18."
She looked at the clock, sighed, and opened her purse.

def moving_average(values, width):
    \"\"\"Return the mean of each run of `width` neighbouring values.\"\"\"
    if width < 1 or width > len(values):
        raise ValueError("width must be between 1 and the number of values")
    total = sum(values[:width])
    means = [total / width]
    for i in range(width, len(values)):
        total += values[i] - values[i - width]
        means.append(total / width)
    return means

To make bread for four people you need 500 grams of flour, 10 grams of salt, 7 grams of dry yeast \
and about 350 millilitres of warm water. Mix the flour with the salt, dissolve the yeast in the \
water, and stir until no dry flour is left. Knead the dough for ten minutes, cover it with a cloth \
and let it rest in a warm place until it has doubled in size. Heat the oven to 230 degrees, shape \
the loaf, and bake it for 35 minutes. It is done when it sounds hollow as you knock on the bottom.

Am Abend ging der alte Mann noch einmal durch den Garten. Der Wind war kalt, die Blumen waren \
schon verwelkt, und unter dem Baum lagen die letzten Birnen im Gras. Er hob eine auf, wischte sie \
am Mantel ab und biss hinein. Sie schmeckte besser als alle, die er im Sommer gegessen hatte.

In 1854 a physician in London marked every death from cholera on a map of the streets around a \
water pump. The marks lay close together near the pump and thinned out with distance, except at a \
brewery, whose workers drank beer, and a workhouse, which had a well of its own. He persuaded the \
parish to take the handle off the pump. Whether the epidemic ended because of that or because most \
people had already fled is still argued about, but the map changed how such questions are asked: \
not what is in the air, but what do the sick have in common?
"""
