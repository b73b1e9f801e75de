// Who may reach the TCP sockets on which a library listens that trusts everyone who does.
#pragma once

#include <set>
#include <string>
#include <vector>

namespace lamina {

// Descriptors of this process's TCP sockets that listen. Throws ChannelError.
std::set<int> tcp_listeners();

// From now on the kernel drops what comes to these sockets, and to every connection that they accept from now
// on, from other IP addresses than `hosts` (numeric, such as "10.0.0.7"): whoever sends it gets no answer. It
// needs no privilege. May be called again. Throws ChannelError.
void admit_only(const std::set<int>& listeners, const std::vector<std::string>& hosts);

}  // namespace lamina
