/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What can become of a packet. Every outcome has a name and is counted per hook (count.h); qpd/model.py names them alike. */
#ifndef QPD_VERDICT_H
#define QPD_VERDICT_H

#include <uapi/linux/pkt_cls.h>

enum verdict {
	VERDICT_NOT_ROCE,       /* anything but RoCEv2 or BFD control: untouched */
	VERDICT_OWN_PATH,       /* egress: the QP's path is this uplink's only next hop: passed */
	VERDICT_REDIRECTED,     /* egress: sent to the QP's path's next hop */
	VERDICT_SECOND_PASS,    /* egress: redirected here by this program a moment ago: passed, not counted twice */
	VERDICT_FRAGMENT,       /* UDP in an IP fragment, first or later: passed */
	VERDICT_TRUNCATED,      /* headers end before the BTH does: passed */
	VERDICT_TAGGED,         /* egress: RoCE under an outer VLAN tag, which a redirect would lose: passed */
	VERDICT_UNKNOWN_GROUP,  /* egress: no destination covers the outer address: passed */
	VERDICT_NO_LIVING_PATH, /* egress: every path of the group is dead: passed */
	VERDICT_MAP_FULL, /* no entry could be made for the QP: passed (egress: steered by slot, not counted per QP) */
	VERDICT_OBSERVED, /* ingress: RoCEv2, counted */
	VERDICT_BFD,      /* BFD control packet, read by the tap, passed */
	VERDICTS
};

/* The parser's word for a RoCEv2 packet, whose verdict its hook still has to find. */
#define VERDICT_OPEN VERDICTS

enum hook { HOOK_STEER, HOOK_OBSERVE, HOOKS };

/* What the program returns. TC_ACT_UNSPEC (TCX_NEXT) lets the next program on the hook have the packet, and after the
 * last one the packet passes: qpd never takes a packet away from others. */
#define PASS TC_ACT_UNSPEC

#endif /* QPD_VERDICT_H */
