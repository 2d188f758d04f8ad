(names, kinds) => {
  // Settings in the address (?p=0.7&seed=3) win over those that this browser kept; what fits neither is left as it is.
  const STORE = 'modification-settings';
  const LIMIT = 200000;

  const parse = (name, text) => {
    const { kind, least, most } = kinds[name];
    if (kind === 'Checkbox') return text === 'true' ? true : text === 'false' ? false : undefined;
    if (kind === 'Slider' || kind === 'Number') {
      const value = Number(text);
      if (text.trim() === '' || !Number.isFinite(value)) return undefined;
      return Math.min(most === null ? value : most, Math.max(least === null ? value : least, value));
    }
    return text && text.length <= LIMIT ? text : undefined;
  };
  const kept = () => { try { return JSON.parse(localStorage.getItem(STORE)) || {}; } catch { return {}; } };

  return {
    restore: (values) => {
      const address = new URLSearchParams(location.search), link = new URLSearchParams(location.search), memory = kept();
      // The link has done its work: a reload goes on from this browser's settings.
      if (names.some((name) => address.has(name))) {
        names.forEach((name) => address.delete(name));
        const rest = address.toString();
        history.replaceState(null, '', location.pathname + (rest ? '?' + rest : ''));
      }
      return values.map((value, at) => {
        const name = names[at], given = link.get(name);
        const fromLink = given === null ? undefined : parse(name, given);
        if (fromLink !== undefined) return fromLink;
        const before = typeof memory[name] === 'undefined' || memory[name] === null ? undefined
          : parse(name, String(memory[name]));
        return before === undefined ? value : before;
      });
    },
    keep: (values) => {
      const kept = JSON.stringify(Object.fromEntries(names.map((name, at) => [name, values[at]])));
      try { localStorage.setItem(STORE, kept); } catch { /* a full or forbidden store */ }
    },
    link: (values) => {
      const address = new URL(location.href);
      const given = values.map((value, at) => [names[at], value === null ? '' : value]); // the first names are a link's
      address.search = new URLSearchParams(given);
      if (navigator.clipboard) navigator.clipboard.writeText(address.href).catch(() => {});
      return address.href;
    },
    forget: () => {
      localStorage.removeItem(STORE);
      location.href = location.origin + location.pathname;
    },
  };
}
