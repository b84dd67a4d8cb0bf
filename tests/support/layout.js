() => {
    // What is wrong with the layout of the page: a list of sentences, empty where nothing is.
    const faults = [];
    const named = (one) => `<${one.tagName.toLowerCase()} ${one.id || one.getAttribute('class') || ''}> `
        + `in ${one.closest('section')?.id ?? 'the page'}: ${one.textContent.trim().slice(0, 40)}`;
    const shown = (one) => one.checkVisibility({ visibilityProperty: true }) && !one.closest('.unseen, .skip')
        && !['absolute'].includes(getComputedStyle(one).position);
    const scrolls = (one) => {
        for (let up = one; up; up = up.parentElement) {
            if (['auto', 'scroll'].includes(getComputedStyle(up).overflowX)) return true;
        }
        return false;
    };
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth > width) {
        faults.push(`the page is ${document.documentElement.scrollWidth} pixels wide`);
    }

    const texts = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const text = walker.currentNode;
        if (text.data.trim() && shown(text.parentElement) && !text.parentElement.closest('script, style, noscript, option')) texts.push(text);
    }
    for (const text of texts) {
        const parent = text.parentElement;
        const range = document.createRange();
        let block = parent;
        while (getComputedStyle(block).display.startsWith('inline')) block = block.parentElement;
        for (const { 0: word, index } of text.data.matchAll(/[\p{L}\p{N}]{2,}/gu)) {
            range.setStart(text, index);
            range.setEnd(text, index + word.length);
            const parts = [...range.getClientRects()];
            const lines = new Set(parts.map(({ top }) => Math.round(top)));
            const fits = parts.reduce((sum, part) => sum + part.width, 0) <= block.clientWidth;
            const upright = getComputedStyle(parent).writingMode === 'horizontal-tb';
            if (lines.size > 1 && fits && upright) faults.push(`“${word}” is broken in ${lines.size}: ${named(parent)}`);
        }
        range.selectNodeContents(text);
        const box = range.getBoundingClientRect();
        if (!scrolls(parent) && (box.right > width + 1 || box.left < -1)) faults.push(`outside of the page: ${named(parent)}`);
    }

    // text that is wider or higher than the box that it stands in
    for (const one of new Set(texts.map(({ parentElement }) => parentElement))) {
        if (one.closest('svg') || scrolls(one) || !one.clientWidth) continue;
        const cut = getComputedStyle(one).textOverflow === 'ellipsis';
        if (!cut && one.scrollWidth > one.clientWidth + 1) faults.push(`${one.scrollWidth} pixels in ${one.clientWidth}: ${named(one)}`);
    }

    for (const drawing of document.querySelectorAll('svg')) {
        if (!shown(drawing)) continue;
        const frame = drawing.getBoundingClientRect();
        const words = [...drawing.querySelectorAll('text')].filter((one) => one.textContent.trim() && one.getBoundingClientRect().width);
        const boxes = words.map((one) => one.getBoundingClientRect());
        words.forEach((one, i) => {
            const { a: cosine, b: sine } = one.getScreenCTM();
            const scale = Math.hypot(cosine, sine);
            const size = scale * parseFloat(getComputedStyle(one).fontSize);
            if (size < 9.5) faults.push(`letters of ${size.toFixed(1)} pixels: ${named(one)}`);
            const [a, slack] = [boxes[i], 1.5];
            if (a.left < frame.left - slack || a.right > frame.right + slack || a.bottom > frame.bottom + slack || a.top < frame.top - slack) {
                faults.push(`outside of its drawing: ${named(one)}`);
            }
            boxes.slice(i + 1).forEach((b, j) => {
                const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
                const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
                if (across > slack && down > 3) faults.push(`over each other: ${named(one)} and ${words[i + 1 + j].textContent}`);
            });
        });
    }
    return [...new Set(faults)];
}
